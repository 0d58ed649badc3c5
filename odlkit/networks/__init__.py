"""Trainable architectures: plain ``nn.Module``s that know nothing of problems or controls."""

from odlkit.networks.classifier import Classifier
from odlkit.networks.conv import ConvUnit, fold_batch_norm
from odlkit.networks.features import Features
from odlkit.networks.flow import FlowNet
from odlkit.networks.metric import LearnedMetric, dct_atoms
from odlkit.networks.rbf import RBFUnit
from odlkit.networks.residual import ResidualNet, clip_to_ball
from odlkit.networks.unet import UNet

__all__ = ["Classifier", "ConvUnit", "Features", "FlowNet", "LearnedMetric", "RBFUnit", "ResidualNet", "UNet"]
__all__ += ["clip_to_ball", "dct_atoms", "fold_batch_norm"]
