"""Examples, prompts and neutral text: the files that are read, and the forms that their lines can take."""
