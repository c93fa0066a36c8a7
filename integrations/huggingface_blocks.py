"""Where the classes of transformers keep the parts of their feed-forward blocks.

A class is entered here once its ``forward`` has been read. Names are those of classes, which carry
their family's name; the few that do not are qualified by their module.

Blocks come in four forms. A module of its own is replaced. Where a layer calls two modules one
after the other (BERT) or holds the linear maps itself (BART), the layer takes the place of the
first part and the others become identities, so that no ``forward`` is touched. Where the block adds
the residual itself (Bloom), so does the layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.nn import functional as F

from ecomoe.sites import AddsResidual, Parts, Refused, Rule, Site, linear_map
from ecomoe.upcycle import Projection

Sites = Site | tuple[Site, ...] | None


def projection(linear: Any) -> Projection:
    """Take the weights of a linear map, also where a class of transformers' own computes it."""
    name = type(linear).__name__
    if name == "Conv1D":  # holds its weight transposed
        return Projection.of(linear.weight.T, linear.bias)
    if name == "FalconLinear":
        return Projection.of(linear.weight, linear.bias)
    return linear_map(linear)


def _refuse(reason: str) -> Rule:
    def rule(module: Any) -> Sites:
        raise Refused(reason)

    return rule


def _bloom(m: Any) -> Sites:
    if m.pretraining_tp > 1 and m.slow_but_exact:
        raise Refused("it sums slices as at pretraining; set slow_but_exact=False first")
    return _BLOOM(m)


_BLOOM = Parts(
    up="dense_h_to_4h",
    act="gelu_impl",
    down="dense_4h_to_h",
    output_dropout="hidden_dropout",
    layer=AddsResidual,
)
_GATED = Parts(gate="gate_proj", up="up_proj", act="act_fn", down="down_proj")
_FC = Parts(up="fc1", act="activation_fn", down="fc2")
_T5_GATED = Parts(gate="wi_0", up="wi_1", act="act", dropout="dropout", down="wo")
_INLINE = replace(_FC, seat="fc1", emptied=("activation_fn", "fc2"))


def _query_former(m: Any) -> Sites:
    names = [("intermediate_query", "output_query")]
    if hasattr(m, "intermediate"):
        names.append(("intermediate", "output"))
    return tuple(_split(first, last)(m) for first, last in names)


def _split(first: str, last: str) -> Parts:
    return Parts(
        up=f"{first}.dense",
        act=f"{first}.intermediate_act_fn",
        down=f"{last}.dense",
        seat=first,
        emptied=(f"{last}.dense",),
    )


_SPLIT = _split("intermediate", "output")


def _lilt(m: Any) -> Sites:
    return _SPLIT(m), _split("layout_intermediate", "layout_output")(m)


_CLASSES: dict[Parts, str] = {
    # Modules of their own.
    _GATED: """
        AXK1MLP AXK2MLP AfmoeMLP Aimv2MLP BailingHybridMLP BambaMLP BltMLP ChameleonMLP
        Cohere2MLP Cohere2MoeMLP CohereCompassMLP CohereMLP CsmMLP CwmMLP DINOv3ViTGatedMLP
        DeepseekOcr2TextMLP DeepseekOcr2VisionMLP DeepseekV2MLP DeepseekV32MLP DeepseekV3MLP
        Deimv2SwiGLUFFN DiffLlamaMLP DiffusionGemmaText4MLP Dinov2SwiGLUFFN
        Dinov2WithRegistersSwiGLUFFN DogeMLP Dots1MLP Dots3NoteTextMLP Dots3NoteVisionMLP
        EmbeddingGemma2MLP Emu3MLP EomtDinov3GatedMLP EomtSwiGLUFFN Ernie4_5MLP Ernie4_5_MoeMLP
        Ernie4_5_VLMoeMLP EsmcMLP EuroBertMLP EvollaMLP Exaone4MLP Exaone4_5_MLP ExaoneMoeMLP
        FlexOlmoMLP FlintMLP Gemma2MLP Gemma3MLP Gemma4TextMLP Gemma4UnifiedTextMLP
        Gemma4VisionMLP GemmaMLP Glm4MoeLiteMLP Glm4MoeMLP Glm4VisionMlp Glm4vMoeTextMLP
        Glm4vMoeisionMlp GlmMoeDsaMLP GlmOcrVisionMlp Granite4VisionTextMLP
        GraniteDoclingTextMLP GraniteMLP GraniteSWAMLP HYV3MLP HYV4MLP HeliumMLP HiggsAudioV2MLP
        HrmTextMLP HunYuanDenseV1MLP HunYuanMoEV1MLP HunYuanVLMLP HyperCLOVAXMLP Idefics2MLP
        IdeficsMLP JambaMLP KimiLinearMLP Kolibri1MLP LagunaMLP LlamaMLP LongcatFlashMLP
        MellumMLP MiMoV2FlashMLP MiniCPM3MLP Ministral3MLP MinistralMLP Mistral4MLP
        MistralLarge4TextMLP MistralMLP MllamaTextMLP Molmo2MLP
        MoonshinMoonshineStreamingDecoderMLP MuseGlimmerAssistantMLP MuseGlimmerTextMLP
        MuseSparkTextMLP NomicBertMLP Olmo2MLP Olmo3MLP OlmoHybridMLP OlmoMLP OlmoeMLP Ovis2MLP
        Ovis2VisionMLP PaddleOCRMLP PeAudioEncoderMLP PeAudioVideoEncoderMLP PeVideoEncoderMLP
        PixtralMLP Qwen2MLP Qwen2MoeMLP Qwen2_5OmniMLP Qwen2_5_VLMLP Qwen3MLP Qwen3MoeMLP
        Qwen3NextMLP Qwen3OmniMoeCode2WavMlp Qwen3OmniMoeMLP Qwen3OmniMoeTalkerTextMLP
        Qwen3OmniMoeThinkerTextMLP Qwen3VLMoeTextMLP Qwen3VLTextMLP Qwen3_5MLP Qwen3_5MoeMLP
        Qwen4ExpTextMLP RadioSwiGLUFFN RecurrentGemmaMlp RfDetrDinov2SwiGLUFFN Sapiens2GatedMLP
        SmolLM3MLP SolarOpenMLP StableLmMLP Tipsv2VisionSwiGLUFFN UltrabertMLP
        UnlimitedOcrTextMLP VaultGemmaMLP VibeVoiceMLP VideomtGatedMLP VideomtSwiGLUFFN
        VoxtralRealtimeMLP VoxtralRealtimeTextMLP YoutuMLP ZambaMLP
    """,
    replace(_GATED, act="activation_fn"): "Llama4TextMLP",
    replace(_GATED, dropout="dropout"): "GteMLP T5Gemma2MLP T5GemmaMLP",
    replace(_GATED, norm="ffn_sub_norm"): "BitNetMLP",
    replace(_GATED, output_dropout="residual_dropout"): "SeedOssMLP",
    Parts(gate="w1", up="w3", act=F.silu, down="w2"): """
        Lfm2MLP Lfm2MoeMLP Lfm3MLP Lfm3VlVisionMLP
    """,
    Parts(gate="w_in.w_0", up="w_in.w_1", act="w_in.act", dropout="dropout", down="w_out"): """
        CpmAntFeedForward
    """,
    Parts(up="gate_up_proj", packed="gate first", act="activation_fn", down="down_proj"): """
        DiaMLP Dots3NoteAudioMLP Glm4MLP Glm4vTextMLP GlmImageTextMLP GlmMLP GlmOcrTextMLP Phi3MLP
        Phi4MultimodalMLP
    """,
    Parts(
        input_norm="layer_norm",
        up="gate_up_proj",
        packed="gate last",
        act="act_fn",
        dropout="dropout",
        down="down_proj",
        output_dropout="dropout",
    ): "Phi4MultimodalAudioMLP",
    Parts(up="Wi", packed="gate first", act="act", dropout="drop", down="Wo"): """
        ModernBertDecoderMLP ModernBertMLP
    """,
    Parts(up="fc1", packed="gate last", act="activation_fn", down="fc2"): """
        MoonshineDecoderMLP MoonshineStreamingDecoderMLP
    """,
    _T5_GATED: """
        Kosmos2_5VisionMlp LongT5DenseGatedActDense MT5DenseGatedActDense
        Pix2StructTextDenseGatedActDense Pix2StructVisionMlp Pop2PianoDenseGatedActDense
        T5DenseGatedActDense UMT5DenseGatedActDense UdopDenseGatedActDense
    """,
    Parts(up="wi", act="act", dropout="dropout", down="wo"): """
        LongT5DenseActDense MT5DenseActDense Pop2PianoDenseActDense SwitchTransformersDenseActDense
        T5DenseActDense UMT5DenseActDense UdopDenseActDense
    """,
    _FC: """
        ASTMLP AltCLIPMLP BeitMLP Blip2MLP BlipMLP CLIPMLP CLIPSegMLP CanaryDecoderMLP
        ChineseCLIPVisionMLP CohereAsrDecoderMLP Cosmos3EdgeMLP Cosmos3EdgeTextMLP DeiTMLP
        Dinov2MLP Dinov2WithRegistersMLP EomtMLP Florence2VisionMLP GitVisionMLP
        GlmImageVisionMLP GradiumPhononTTSMLP GraniteDoclingVisionMLP GroupViTMLP HieraMlp
        HunYuanVLVisionMLP IJepaMLP Idefics2VisionMLP Idefics3VisionMLP Inkling2VisionMLP
        InstructBlipMLP InstructBlipVideoMLP InternVLVisionMLP JinaEmbeddingsV3MLP
        Kosmos2VisionMLP Llama4VisionMLP MLCDMLP MetaClip2MLP MimiMLP MiniCPMOcrVisionMLP
        MiniCPMV4_6VisionMLP MiniCPMV4_7VisionMLP MiniMaxM3VLVisionMLP MllamaVisionMLP
        Molmo2VisionMLP MoonshineEncoderMLP MoonshineStreamingEncoderMLP MuseSparkAudioMLP
        NanoChatMLP Nemotron3DiarizationMLP Nemotron3_5TranscribeMLP NeuCodecMLP
        OneFormerTextMLP OwlViTMLP Owlv2MLP PaddleOCRVisionMLP Phi4MultimodalVisionMLP PhiMLP
        PixioMLP PocketTTSAudioTokenizerMLP PocketTTSMLP QianfanOCRVisionMLP RadioMLP
        RfDetrDinov2MLP Sam3LiteTextTextMLP Siglip2MLP SiglipMLP SmolVLMVisionMLP
        Step3p7VisionMLP SwinMLP TimesFm2_5MLP Tipsv2MLP Tipsv2VisionMLP UnlimitedOcrMLP
        ViTMAEMLP ViTMLP ViTMSNMLP VideoLlama3VisionMLP VideoPrismMLP VideomtMLP VivitMLP
        XCLIPMLP Xcodec2MLP
    """,
    replace(_FC, dropout="activation_dropout", output_dropout="dropout"): """
        ConditionalDetrMLP DeformableDetrMLP DetrMLP MaskFormerDetrMLP PPDocLayoutV2MLP
        PPDocLayoutV3MLP PPDocLayoutV4MLP RTDetrMLP RTDetrV2MLP
    """,
    replace(
        _FC, dropout="activation_dropout", norm="ffn_layernorm", output_dropout="dropout"
    ): "Kosmos2TextFFN Kosmos2_5TextFFN",
    replace(_FC, dropout="dropout1", output_dropout="dropout2"): "JanusVisionMLP",
    replace(_FC, act="act"): """
        Ernie4_5VLVisionMLP Kimi_K25VisionMLP MuseGlimmerVisionMLP MuseSparkVisionMLP VisionMlp
    """,
    replace(_FC, act="act_fn"): "GlmAsrMLP",
    replace(_FC, act="activation"): "VJEPA2MLP VitPoseBackboneMLP",
    replace(_FC, act="activation", dropout="drop", output_dropout="drop"): "FocalNetMlp",
    replace(_FC, act="act", dropout="drop", output_dropout="drop"): """
        LwDetrViTMlp MgpstrMlp VitDetMlp
    """,
    replace(_FC, act="act", dropout="dropout"): """
        NllbMoeDenseActDense SeamlessM4TFeedForwardNetwork SeamlessM4Tv2FeedForwardNetwork
    """,
    Parts(up="up_proj", act="act_fn", down="down_proj"): """
        ApertusMLP ArceeMLP DINOv3ViTMLP EomtDinov3MLP Jais2MLP NemotronHMLP NemotronMLP NeoMMEMLP
        Sapiens2MLP
    """,
    Parts(up="linear_fc1", act="act_fn", down="linear_fc2"): """
        CohereCompassVisionMLP Qwen3OmniMoeVisionMLP Qwen3VLMoeVisionMLP Qwen3VLVisionMLP
        Qwen3_5MoeVisionMLP Qwen3_5VisionMLP Qwen4ExpVisionMLP
    """,
    Parts(up="linear1", act="activation", dropout="activation_dropout", down="linear2"): """
        GraniteSpeech5EncoderFeedForward LasrEncoderFeedForward
        NemotronAsrStreamingEncoderFeedForward ParakeetEncoderFeedForward
    """,
    Parts(up="linear1", act="activation", down="linear2"): """
        VibeVoiceAcousticTokenizerFeedForward VibeVoiceAsrFeedForward
    """,
    Parts(
        input_norm="pre_norm",
        up="up_proj",
        act="silu",
        dropout="dropout",
        down="down_proj",
        output_dropout="dropout",
    ): "GraniteSpeechConformerFeedForward GraniteSpeechPlusConformerFeedForward",
    Parts(up="lin1", act="act", down="lin2"): """
        DeepseekOcr2SamMLPBlock GotOcr2MLPBlock PPFormulaNetMLPBlock SLANeXtMLPBlock SamHQMLPBlock
        SamMLPBlock SegGptMlp UnlimitedOcrSamMLPBlock
    """,
    Parts(up="lin1", act="act", down="lin2", output_dropout="dropout"): "TransformerFFN",
    Parts(up="lin1", act="activation", down="lin2", output_dropout="dropout"): """
        distilbert.modeling_distilbert.FFN
    """,
    Parts(
        up="intermediate_dense",
        act="intermediate_act_fn",
        dropout="intermediate_dropout",
        down="output_dense",
        output_dropout="output_dropout",
    ): """
        Data2VecAudioFeedForward HubertFeedForward SEWFeedForward SeamlessM4TConformerFeedForward
        SeamlessM4Tv2ConformerFeedForward SpeechT5FeedForward UniSpeechFeedForward
        UniSpeechSatFeedForward Wav2Vec2BertFeedForward Wav2Vec2ConformerFeedForward
        Wav2Vec2FeedForward WavLMFeedForward
    """,
    Parts(
        up="intermediate",
        act="activation_fn",
        dropout="activation_dropout",
        down="output",
        output_dropout="dropout",
    ): "ProphetNetFeedForward",
    Parts(up="c_fc", act="act", down="c_proj", output_dropout="dropout", linear=projection): """
        ClvpDecoderMLP DecisionTransformerGPT2MLP GPT2MLP GPTBigCodeMLP GPTNeoMLP ImageGPTMLP
        openai.modeling_openai.MLP
    """,
    Parts(up="c_fc", act="act", down="c_proj", output_dropout="residual_dropout"): """
        Starcoder2MLP
    """,
    Parts(up="fc_in", act="act", down="fc_out", output_dropout="dropout"): """
        CodeGenMLP GPTJMLP
    """,
    Parts(up="in_proj", act="gelu", down="out_proj", output_dropout="dropout"): "BarkMLP",
    Parts(up="dense_h_to_4h", act="act", down="dense_4h_to_h", linear=projection): """
        FalconMLP GPTNeoXJapaneseMLP GPTNeoXMLP PersimmonMLP
    """,
    Parts(
        up="dense1",
        act="intermediate_act_fn",
        dropout="dropout",
        down="dense2",
        output_dropout="dropout",
    ): "PvtFFN",
    Parts(
        up="conv1.convolution",
        act="conv1.activation",
        dropout="dropout1",
        down="conv2.convolution",
        output_dropout="dropout2",
    ): "MobileViTV2FFN",
    Parts(up="mlp.proj_in", act="mlp.activation", down="mlp.proj_out", seat="mlp"): """
        Sam2MultiScaleBlock
    """,
    Parts(up="dense1", act="intermediate_act_fn", down="dense2"): "PerceiverMLP",
    # They add the residual themselves.
    Parts(
        up="up_proj",
        act="act",
        down="down_proj",
        output_dropout="hidden_dropout",
        layer=AddsResidual,
    ): "MptMLP",
    # Split over two modules.
    _SPLIT: """
        AlignTextLayer AltRobertaLayer BertGenerationLayer BertLayer BigBirdLayer
        BlipTextLayer BridgeTowerBertCrossLayer BridgeTowerTextLayer BrosLayer
        CamembertLayer CanineLayer ChineseCLIPTextLayer ClapAudioLayer ClapTextLayer
        ConvBertLayer DPTViTLayer Data2VecTextLayer Data2VecVisionLayer DebertaLayer
        DebertaV2Layer DinatLayer DonutSwinLayer ElectraLayer ErnieLayer FNetLayer FlavaLayer
        GitLayer LayoutLMLayer
        LayoutLMv2Layer LayoutLMv3Layer LongformerLayer LukeLayer LxmertLayer
        MPNetLayer MarkupLMLayer MaskFormerSwinLayer MegatronBertLayer MobileBertLayer
        MobileViTTransformerLayer MraLayer NystromformerLayer PPDocLayoutV2ReadingOrderLayer
        RemBertLayer RoCBertLayer RoFormerLayer RobertaLayer SEWDLayer SplinterLayer
        Swin2SRLayer Swinv2Layer TapasLayer TvpEncodeLayer VideoMAELayer ViltLayer
        VisualBertLayer XLMRobertaLayer XLMRobertaXLLayer XmodLayer YolosLayer YosoLayer
        mobilebert.modeling_mobilebert.FFNLayer
    """,
    replace(_SPLIT, act="intermediate.activation"): "CvtLayer",
    replace(_SPLIT, act=F.gelu): "EsmLayer EvollaSaProtLayer",
    replace(_SPLIT, dropout="intermediate.dropout"): "TimesformerLayer",
    replace(_SPLIT, input_norm="intermediate.LayerNorm"): "RobertaPreLayerNormLayer",
    # What stands after a depthwise convolution of the hidden features.
    Parts(down="fc2", seat="fc2"): "SegformerMixMLP",
    Parts(down="dense2", seat="dense2"): "GLPNMixFFN PvtV2ConvFeedForwardNetwork",
    # Inline in a layer.
    replace(_INLINE, dropout="activation_dropout", zeroed=("activation_dropout",)): """
        AudioFlamingo3EncoderLayer AutoformerDecoderLayer AutoformerEncoderLayer
        BartDecoderLayer BartEncoderLayer BigBirdPegasusDecoderLayer BioGptDecoderLayer
        BlenderbotDecoderLayer BlenderbotEncoderLayer BlenderbotSmallDecoderLayer
        BlenderbotSmallEncoderLayer GroundingDinoDecoderLayer GroundingDinoDeformableLayer
        InformerDecoderLayer InformerEncoderLayer LEDDecoderLayer LEDEncoderLayer
        M2M100DecoderLayer M2M100EncoderLayer MBartDecoderLayer MBartEncoderLayer
        MMGroundingDinoDecoderLayer MMGroundingDinoDeformableLayer MarianDecoderLayer
        MarianEncoderLayer Mask2FormerMaskedAttentionDecoderLayer
        Mask2FormerPixelDecoderEncoderLayer MossTranscribeDiarizeAudioLayer MusicgenDecoderLayer
        MusicgenMelodyDecoderLayer MvpDecoderLayer MvpEncoderLayer PLBartDecoderLayer
        PLBartEncoderLayer PPFormulaNetDecoderLayer PegasusDecoderLayer PegasusEncoderLayer
        PegasusXDecoderLayer PegasusXEncoderLayer Qwen2AudioEncoderLayer Speech2TextDecoderLayer
        Speech2TextEncoderLayer TableTransformerDecoderLayer TableTransformerEncoderLayer
        TimeSeriesTransformerDecoderLayer TimeSeriesTransformerEncoderLayer TrOCRDecoderLayer
        VoxtralEncoderLayer WhisperDecoderLayer WhisperEncoderLayer XGLMDecoderLayer
        fsmt.modeling_fsmt.DecoderLayer fsmt.modeling_fsmt.EncoderLayer
    """,
    _INLINE: """
        BigBirdPegasusEncoderLayer OPTDecoderLayer Qwen2_5OmniAudioEncoderLayer
        Qwen3ASRAudioEncoderLayer Qwen3OmniMoeAudioEncoderLayer
    """,
    replace(_INLINE, act="activation", emptied=("activation", "fc2")): """
        GroundingDinoTextEnhancerLayer MMGroundingDinoTextEnhancerLayer
    """,
    Parts(
        up="ffn",
        act="activation",
        down="ffn_output",
        seat="ffn",
        emptied=("activation", "ffn_output"),
    ): "AlbertLayer",
    Parts(up="ffn.0", act="ffn.1", down="ffn.2", seat="ffn"): """
        ctrl.modeling_ctrl.EncoderLayer
    """,
    Parts(
        up="pwconv1", act="act", down="pwconv2", seat="pwconv1", emptied=("act", "pwconv2")
    ): "ConvNextLayer Qwen3OmniMoeConvNeXtBlock",
    Parts(
        up="pointwise_conv1",
        act="activation_fn",
        down="pointwise_conv2",
        seat="pointwise_conv1",
        emptied=("activation_fn", "pointwise_conv2"),
    ): "DINOv3ConvNextLayer",
    Parts(
        up="layer_1",
        act="activation_function",
        dropout="dropout",
        down="layer_2",
        output_dropout="dropout",
        seat="layer_1",
        emptied=("activation_function", "dropout", "layer_2"),
    ): "XLNetFeedForward",
    Parts(
        up="linear_1",
        act="activation_function",
        dropout="activation_dropout",
        down="linear_2",
        seat="linear_1",
        emptied=("activation_function", "activation_dropout", "linear_2"),
    ): "FunnelPositionwiseFFN",
    Parts(
        up="fc1",
        act="act",
        dropout="drop",
        down="fc2",
        output_dropout="drop",
        seat="fc1",
        emptied=("act", "drop", "fc2"),
    ): "SwiftFormerMlp",
}

_REFUSED = {
    "its global response norm pools hidden features over the whole image, so it cannot work token "
    "by token": "ConvNextV2Layer",
    "its hidden features go through convolutions over time, so it cannot work token by token": (
        "VitsFeedForward"
    ),
    "it mixes each token with the one before": "RwkvFeedForward",
    "its linear maps are quantised": "IBertLayer",
    "its linear maps are grouped convolutions": "SqueezeBertModule",
}

RULES: dict[str, Rule] = {
    **{name: rule for rule, names in _CLASSES.items() for name in names.split()},
    **{name: _refuse(why) for why, names in _REFUSED.items() for name in names.split()},
    "BloomMLP": _bloom,
    "LiltLayer": _lilt,
    "Blip2QFormerLayer": _query_former,
    "InstructBlipQFormerLayer": _query_former,
    "InstructBlipVideoQFormerLayer": _query_former,
}
