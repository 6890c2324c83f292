"""Questions asked of the run folders. The folders are the truth; what is kept beside them can be thrown away."""
