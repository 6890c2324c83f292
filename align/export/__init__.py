"""What leaves the project: an adapter or a merged model, each with a card that says how it came to be."""
