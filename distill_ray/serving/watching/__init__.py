"""Second looks: some of what a student answered, answered by the teacher too, off the request path, and what follows.

second_look   in a router: asks, compares, reports a Look
drift         when looks show that the student in service keeps its error budget no longer: arithmetic
overseer      in the keeper: hears the looks of all routers, raises the threshold, goes back, writes it down
"""
