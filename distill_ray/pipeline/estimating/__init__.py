"""`distill-ray plan`: rows, tokens, memory, hours and money before anything is rented. No Ray, no GPU, no call.

    config -> workload (rows, sampled tokens) ----------------.
    models -> sizes -> memory (fits? how many at once) -> speed -> estimate (stages) -> render
    a trial's run folder -> measured ------------------------'

A figure is measured (a run folder that is named with --run-dir), else given (the config's `plan:`), else estimated.
A measurement comes before a given key: the folder is named for this one plan, on the command line, and is what the
same recipe, teacher and data did, while a key may be the guess that the trial was run to replace. To plan with the key,
leave --run-dir away. Speeds are taken from a run only where `plan:` named the same GPU for it.
"""
