"""What the pages say: their code runs, their commands parse, their links lead somewhere."""
