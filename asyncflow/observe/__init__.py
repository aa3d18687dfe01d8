"""What is seen: metrics, journals, the timeline and the report. Reads events and spans; decides nothing."""
