"""What the expression language is made of: terms, with the tokens they act on and the conditions they depend on."""
