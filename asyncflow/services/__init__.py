"""Who acts: one service per model. Mailboxes -> stage -> channels, the same in Ray actors and in one process."""
