"""For which requests is the student as good as the teacher? A run folder becomes a bundle."""
