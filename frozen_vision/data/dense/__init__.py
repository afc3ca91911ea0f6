"""Images with surface normals and depth: sources, transforms, codewords."""
