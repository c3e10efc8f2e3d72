r"""Ray job: the service, until the job is stopped.

    ray job submit --no-wait --runtime-env jobs/runtime_env.yaml -- \
        python jobs/serve.py CONFIG --set serve.folder=/shared/services/NAME --set serve.host=0.0.0.0

Takes the arguments of `distill-ray serve`; the cluster is the one that the job runs on. It listens on every node that
has a proxy of Ray Serve, the head for one; without serve.host on its loopback only. The service's folder has to be on a
file system that all nodes see, and outside what is uploaded, as with the job the upload goes.
"""

import sys

from distill_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "serve")
    main()
