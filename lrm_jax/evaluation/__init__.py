"""The evaluation behind `lrm evaluate`: of objects, of scenes, their scores, and the page that shows them."""
