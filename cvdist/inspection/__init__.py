"""What is wrong with a labeled set of pictures: copies, wrong labels and odd pictures, from its features."""
