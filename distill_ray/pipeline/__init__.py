"""The stages of a run on Ray: generate, train, evaluate. Each takes (config, run folder) and is safe to repeat.

planning/  ->  generate (worker, ledger, tally)  ->  training/  ->  evaluate (scoring, metrics)  ->  report
"""
