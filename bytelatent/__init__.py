"""bytelatent."""
