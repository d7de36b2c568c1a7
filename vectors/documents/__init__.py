"""What is read: JSON and YAML of anyone, with bounds, and the schemas that their values are checked against."""
