"""freeze_omni_lite: Freeze-Omni from data to dialogue, small enough to train on a laptop and to read in a course.

The notebook is the training script, this library is the set of parts, a stage folder on disk is the hand-over.

| section of the paper                      | files                                            | notebook |
|-------------------------------------------|--------------------------------------------------|----------|
| Overview                                  | system, verbs, plots, widgets                    | 00       |
| Speech decoder: codec                     | codebook, codec, discriminator                   | 01       |
| Chunk-wise streaming speech encoder       | audio, augmentation, chunk, attention, encoder   | 02       |
| Training strategy of the speech input     | adapter, frozen_llm, thin_llama, text, turns     | 03, 04   |
| Streaming speech decoder                  | codec, speech_tokens, answers, numerals          | 05       |
| Training strategy of the speech output    | speech_decoder                                   | 06, 07   |
| Design for duplex dialogue                | duplex, scenes, vad, hearing, dialogue,          | 08, 10   |
|                                           | answering, context, scenarios, simulation        |          |
| Evaluation                                | evaluation, metrics, decisions, bench,           | 09       |
|                                           | listening, speaking, conversation                |          |
| (LLaMA-Omni, the second system)           | llama_omni                                       | 11       |
| (presets, training, hand-over, 8 GPUs)    | scales, training, stages, fingerprint, ranks     | 12       |
| (data)                                    | sentences, voices, samples                       | 02, 05   |

Around them: `notebook`, `course`, `kernel`, `run`, `gallery` and `__main__` (the course and the command line), `parts`
and `doctor` (what is fetched once, what is missing), `measure` and `results` (figures beside bars), `errors`,
`files`, `threads`.

Glossary
    chunk            160 ms of the user's audio: 16 mels, 4 encoder frames, 2 vectors for the LLM
    frame            one encoder output, 40 ms; 25 a second
    adapter          turns 2 encoder frames into 1 vector of the LLM's width; 12.5 a second
    prompt_embedding a few trained vectors in front of the speech: "answer this" instead of "write this down"
    task_embedding   the same idea for recognition
    hidden_state     the last layer's output of the frozen LLM, one vector a text token
    speech_token     one code out of the codec's one codebook; 40 a second, 600 samples at 24 kHz each
    nar, ar          the speech decoder's two uses: non-autoregressive prefill of a text segment, autoregressive steps
    prefix           the decoder that writes the LLM's hidden states into the first entries of the kv_cache
    dialogue_state   KEEP_LISTENING 0, TAKE_TURN 1, NO_RESPONSE 2: read at the last frame of every chunk
    stage            one training run and its folder: weights, stage.json, metrics; scale: tiny, laptop, gpu or paper
"""

from .threads import set_threads

__version__ = "0.1.0"

set_threads()  # before anything loads torch
