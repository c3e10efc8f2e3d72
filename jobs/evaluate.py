"""Ray job: student against teacher on held-out rows.

    ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/evaluate.py CONFIG --run-dir s3://BUCKET/runs/NAME

Takes the arguments of `distill-ray evaluate`; the cluster is the one that the job runs on.
"""

import sys

from distill_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()
