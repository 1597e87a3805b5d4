"""One function a figure, each in the file of its name. They read records, logs or plain arrays, and never train. No torch here."""
