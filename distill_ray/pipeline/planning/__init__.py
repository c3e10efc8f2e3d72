"""Sources to planned rows, without Ray.

`sources` says which files there are, `readers` (over `textfile`) turn a file into rows, `planner` decides on one row,
`scratch` remembers on disk what occurred before, and `plan` drives them and writes `rows/`.
"""
