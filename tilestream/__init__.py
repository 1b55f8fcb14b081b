"""tilestream: any traced CNN, forward and backward over an image of any size, exactly, in a memory budget."""
