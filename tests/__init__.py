"""Floor 4, the tests. (A package, so that pytest finds the files of the project beside it.)"""
