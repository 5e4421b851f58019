"""Reading a run: in the terminal (`inspect`) and as one HTML file (`report`)."""
