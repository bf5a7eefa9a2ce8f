"""What every model card of the Forge says on how to use the model."""

USE = """## Use

```bash
agent-forge chat PATH_TO_THIS_FOLDER "sort 40213"
```

```python
import forgekit
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER")
```"""
