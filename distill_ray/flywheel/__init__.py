"""From collected pairs to a promoted student, in steps that each leave a file."""
