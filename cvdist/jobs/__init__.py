"""The jobs, a file each: from the settings to what is printed."""
