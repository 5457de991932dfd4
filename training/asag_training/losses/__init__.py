"""The losses that training minimises (design: paper sections 4.2 and 4.3, appendix A).

    criterion = Criterion(LossConfig(), network.patch_size)
    losses = criterion(output, targets)
    losses.total.backward()

`anchors` holds the losses of the anchor generator, patch by patch; `queries` those of the relation block, the
decoders and denoising; `targets` what each patch is to find; `criterion` puts them together.
"""
