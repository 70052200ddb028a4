"""The places where an eraser enters a pipeline: context managers that open it and close it again, bit-exactly."""
