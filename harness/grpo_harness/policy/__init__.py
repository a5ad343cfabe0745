"""A name -> files on disk, whole and known by their content."""
