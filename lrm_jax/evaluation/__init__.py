"""The evaluation behind `lrm evaluate`: objects, scenes, scores, and the page that shows them."""
