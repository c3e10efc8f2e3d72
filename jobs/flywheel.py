"""Ray job: one cycle of the flywheel, or one after the other.

    ray job submit --working-dir . -- python jobs/flywheel.py CONFIG --every 24h

Takes the arguments of `distill-ray flywheel run`; the cluster is the one that the job runs on. The service's folder is
one that this job and the service see.
"""

import sys

from distill_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["flywheel", "run"]
    main()
