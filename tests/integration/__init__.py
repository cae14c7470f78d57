"""One real thing each: a server, a process, a job."""
