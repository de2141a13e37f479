"""Data sets, their splits, and the image preparation that training and deployment share; torch is not needed."""
