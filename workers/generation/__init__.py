"""The engines that draw rollouts, behind one seam (`engine.Engine`)."""
