"""What a person looks at: report.md, its plots and pictures, and the rows a step writes for them."""
