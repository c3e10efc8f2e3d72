"""What is kept of the teacher's answers: pairs, from a spool on each router's disk to one store."""
