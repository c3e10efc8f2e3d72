"""Ray job: student against teacher on held-out rows.

    ray job submit --working-dir . -- python jobs/evaluate.py CONFIG --run-dir s3://bucket/run

Takes the arguments of `distill-ray evaluate`; the cluster is the one that the job runs on.
"""

import sys

from distill_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()
