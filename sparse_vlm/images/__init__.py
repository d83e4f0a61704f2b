"""The one way in for images: files and tars to PIL images, and those to what a tower is given."""
