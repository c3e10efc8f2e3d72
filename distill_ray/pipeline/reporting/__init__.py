"""What a run was and what came of it, for people.

`facts` reads the run folder, `sections` says it in Markdown, `charts` draws it, `page` makes one HTML file of both, and
`report` writes them.
"""
