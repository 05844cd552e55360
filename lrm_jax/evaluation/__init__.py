"""What `lrm evaluate` does: objects, scenes, their scores, and the page that shows them."""
