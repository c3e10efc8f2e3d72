"""The online half: one OpenAI-compatible endpoint in front of student and teacher.

A request goes to the student where it is known to be good, else to the teacher, whose complete answers are kept as
pairs for the next training. What decides (router, index, decision) and what keeps (pairs, spool, store, writer) knows
no Ray; the applications around it do.
"""
