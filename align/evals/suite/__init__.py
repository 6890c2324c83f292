"""What systems are asked, and how their answers are scored and compared."""
