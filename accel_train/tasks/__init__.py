"""What is learned and how it is judged: tasks and their criteria."""
