"""Work on many machines, by Ray; it schedules, retries and shows what runs."""
