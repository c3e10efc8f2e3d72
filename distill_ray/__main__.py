"""`python -m distill_ray` is the `distill-ray` command."""

from distill_ray.cli import main

if __name__ == "__main__":
    main()
