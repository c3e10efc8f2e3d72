"""What a run was and what came of it, for people.

`sections` reads the run folder and says it in Markdown, `charts` draws it, `page` makes one HTML file of both, and
`report` writes them.
"""
