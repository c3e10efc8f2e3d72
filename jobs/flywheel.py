r"""Ray job: one cycle of the flywheel, or one after the other.

    ray job submit --runtime-env jobs/runtime_env.yaml -- \
        python jobs/flywheel.py CONFIG --set serve.folder=/shared/services/NAME --every 24h

Takes the arguments of `distill-ray flywheel run`; the cluster is the one that the job runs on. The service's folder has
to be outside what is uploaded: an absolute path that this job, Ray's workers and the service see. In the job's copy of
the working directory the service would never see what was promoted, and with the job it is gone; so that is refused.
"""

import sys

from distill_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["flywheel", "run"]
    main()
