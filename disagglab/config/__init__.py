"""What is asked: labs, workloads, arrivals, conversations; every mistake with its mend."""
