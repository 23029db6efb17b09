"""What a text costs a trained model, and two models: by line, by kind of byte, as JSON and as a
picture. A text is read once, in memory that does not grow with it."""
