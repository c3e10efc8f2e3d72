"""Ray job: ask the teacher, write examples/.

    ray job submit --working-dir . -- python jobs/generate.py CONFIG --run-dir s3://bucket/run

Takes the arguments of `distill-ray generate`; the cluster is the one that the job runs on.
"""

import sys

from distill_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "generate")
    main()
