"""The online half: one OpenAI-compatible endpoint in front of a student and its teacher.

    request -> conversation   what kind of request it is, and the text to compare
            -> embedder       the text as a vector
            -> index          the nearest requests that the student was trained on

Ray is not imported here: these parts know their work, not the cluster.
"""
