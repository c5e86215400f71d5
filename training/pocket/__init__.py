"""The pocket fleet: tiny experts with exact graders, made by the project itself."""
