"""The web pages: what every agent learned, and the means to steer it. They hold no state of their own."""
